"""RMSNorm, plain and with the residual added first. See README.md."""
