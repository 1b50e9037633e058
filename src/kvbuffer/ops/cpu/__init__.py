"""C++ CPU kernels behind a plain C interface, called through ctypes (which releases the GIL)."""
