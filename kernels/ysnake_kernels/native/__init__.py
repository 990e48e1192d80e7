"""Writing on a CPU by C++ code that is compiled on the machine that runs it.

One token passes through the whole model in one call. The weights are float32, bfloat16, int8 or
int4. Where there is no compiler, nothing needs this folder: `linear_step` and `mixer_step` do the
same in pure torch.
"""
