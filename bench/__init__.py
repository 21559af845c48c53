"""The benchmark harness: `python -m bench <name>` from the source tree, `python -m kvlite.bench <name>` from the wheel.

Every benchmark is one module with `main(arguments) -> int`. It states the physics in its header, checks correctness
before it prints a speed, and ends in one JSON line. Uses what the engine uses; a gate against transformers needs that
package too, and `compare` starts peers in environments of their own.
"""
