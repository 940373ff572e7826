"""Many hospitals on one machine: synthetic hospitals, partitions, the in-process engine, studies."""
