"""RULER (Hsieh et al. 2024, arXiv 2404.06654): thirteen synthetic tasks at any length, as NVIDIA/RULER made them at c3f5e3b (July 2026)."""
