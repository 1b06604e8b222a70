"""The machine: device, units, paths, durable files, stepwise work."""
