"""The runner: carries out the core's plans on a device.

Decides nothing and keeps no state but tables indexed by seq_row. Called by engine.py.
"""
