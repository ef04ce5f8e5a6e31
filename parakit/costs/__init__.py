"""What a step costs on any number of workers, by causes: computing, waiting, exchange, update, control."""
