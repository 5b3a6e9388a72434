"""The training system: recipes, data, models, the one loop and its run folders. Needs the extra ``train``."""
