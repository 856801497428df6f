"""LongRoPE: rotary frequencies divided by factors that a search has found (Ding et al. 2024, arXiv 2402.13753; Shang et al. 2025,
arXiv 2502.20082)."""
