"""The frozen diffusion model: schedule, prompts, networks, guidance and DDIM inversion.

Modules import each other downward only: schedule <- prompt <- denoiser, encoder <- guide <-
invert <- invert_graph <- pipeline.
"""
