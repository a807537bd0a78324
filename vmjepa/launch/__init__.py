"""Starting work: local launches. Nothing at import time needs torch, so a login node can use this package."""
