"""What the machine is: device, units, paths, durable files, stepwise work."""
