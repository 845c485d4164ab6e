"""The places of a cluster's records, and the connections and the session to ask for them."""
