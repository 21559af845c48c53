"""Several engines behind one door: a front-end that owns the streams, a worker process per engine, live migration.

Import what you need from its modules; this file stays light, because the command line reads its name for --help.
"""
