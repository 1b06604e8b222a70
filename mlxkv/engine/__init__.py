"""Many answers on one MLX thread: messages, runtime, scheduler, model pool."""
