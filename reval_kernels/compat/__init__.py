"""The calls of other libraries, computed by token_values and linear_token_values: one changed import switches.

`trl_utils` has the names of trl.trainer.utils, `trl_kernels` those of trl.kernels (TRL 1.16), `liger` those of
liger_kernel (0.8.5): the same arguments in the same order with the same defaults. docs/coming_from.md says what each
returns and where it differs. The other libraries need not be installed.
"""
