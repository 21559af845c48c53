"""SiLU-gated product of the two halves of one projection. See README.md."""
