"""Triton kernels and their launchers, installed as `effkern._triton`; importing a family imports triton."""
