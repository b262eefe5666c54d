"""The typed configuration: composed by Hydra, checked before anything is built."""
