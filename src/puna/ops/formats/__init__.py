"""Number formats: how a weight is stored in few bits, apart from how the bits were chosen.

From the idea to the bytes: `scheme` (bits, granularity), `rounding` (scales, codes and back), `words` (codes to dense
bit streams), `packed` (the canonical weight that every method ends in); `fake` (training through rounding),
`activations` and `kv` (numbers rounded while the model runs). Other tools' layouts: `compressed`, `gptq`, `awq`;
llama.cpp's blocks: `gguf`. Pure functions on tensors: no files, no model.
"""
