"""The diffusion process: noise levels, conditions, tokenizers and samplers."""
