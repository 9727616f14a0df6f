"""Triton kernels and their launchers; no autograd here."""
