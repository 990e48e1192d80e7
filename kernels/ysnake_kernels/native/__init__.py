"""Decoding on a CPU with C++ code that is compiled on the machine that runs it.

One token passes through the whole model in one call. The weights are float32, bfloat16, int8 or
int4. `state_step` takes a token through the recurrence alone. Without a compiler this folder is not
used: `linear_step`, `mixer_step` and `step` are pure torch.
"""
