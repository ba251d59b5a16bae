"""What corehead costs and gains, in time and memory: ``python -m corehead.bench`` writes data/results/bench/."""
