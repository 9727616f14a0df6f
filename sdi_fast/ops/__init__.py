"""The stages' operations: argument checks, backends, autograd.

One module an op, each with the signature of its twin in `sdi_fast.reference` plus the keyword
`backend`: "auto", "reference" (PyTorch), "cpu" (C++), "cuda", some also "triton".
"""
