"""llama.cpp's files: the container (`file`), the shape and the words as its metadata spell them (`spec`, `vocabulary`,
`tokenizer`), which tensor gets which type (`mix`), and a whole model in and out (`model`).
"""
