"""Writing on a CPU by C++ code that is compiled on the machine that runs it.

One token passes through the whole model in one call. The weights are float32, bfloat16, int8 or
int4. Without a compiler this folder is not used: `linear_step` and `mixer_step` then write in pure
torch, in float32 or int8.
"""
