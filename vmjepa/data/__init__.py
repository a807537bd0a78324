"""The data path: shards and loose files in, decoded clips out, in an order that is a pure function of the seed."""
