"""deltafan_worker: takes jobs off the queue, calls the model, publishes every delta.

Run it with `deltafan worker`. Needs the `worker` extra; importing this package alone does not.
"""
