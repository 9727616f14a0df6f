"""The frozen diffusion model: schedule, prompts, networks, guidance and DDIM inversion.

Modules import each other downward only: schedule <- prompt <- denoiser, vae_pack <-
fast_encoder <- encoder_graph <- encoder <- guide <- invert <- invert_graph <- pipeline.
"""
