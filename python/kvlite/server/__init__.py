"""The HTTP face of one engine: OpenAI's wire format over AsyncEngine.

app.py routes, gate.py guards the door, fields.py and protocol.py turn bytes into checked requests, stream.py turns
deltas into answers, metrics.py counts, __main__.py starts and stops. Nothing here knows tensors, blocks or plans.
"""
