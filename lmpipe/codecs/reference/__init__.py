"""Codecs in plain torch: the oracles of the native and the GPU kernels. No production module imports them."""
