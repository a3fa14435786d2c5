"""`fgvc ablate`: what each technique buys under one graph and one budget, paired by seed, chosen on validation."""
