"""C++ CPU kernels behind a plain C interface; optional, loaded with ctypes by `ops/linear.py`."""
