"""The site agent: inventory, runtimes, miners, meters, the safety loop and the sync with the control plane."""

__version__ = "0.1.0"
