"""What the machine code of the CUDA kernels tells of their time, without a GPU."""
