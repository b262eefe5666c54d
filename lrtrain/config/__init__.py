"""The typed configuration: composed by Hydra, validated before anything is built."""
