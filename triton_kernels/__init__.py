"""Triton kernels of pixnorm's ops; importing ``pixnorm`` imports none of them."""
