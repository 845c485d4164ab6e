"""Where the records of a cluster are, and the connections and the session to ask for them."""
