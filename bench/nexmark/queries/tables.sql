-- The streams, a topic each. Flink's benchmark has them in one stream, and filters it three times.
CREATE TABLE person (
    id BIGINT, name VARCHAR, emailAddress VARCHAR, creditCard VARCHAR, city VARCHAR, state VARCHAR,
    dateTime TIMESTAMP, extra VARCHAR,
    WATERMARK FOR dateTime AS dateTime - INTERVAL '4' SECOND
) WITH (topic = 'person', format = 'json');

CREATE TABLE auction (
    id BIGINT, itemName VARCHAR, description VARCHAR, initialBid BIGINT, reserve BIGINT,
    dateTime TIMESTAMP, expires TIMESTAMP, seller BIGINT, category BIGINT, extra VARCHAR,
    WATERMARK FOR dateTime AS dateTime - INTERVAL '4' SECOND
) WITH (topic = 'auction', format = 'json');

CREATE TABLE bid (
    auction BIGINT, bidder BIGINT, price BIGINT, channel VARCHAR, url VARCHAR,
    dateTime TIMESTAMP, extra VARCHAR,
    WATERMARK FOR dateTime AS dateTime - INTERVAL '4' SECOND
) WITH (topic = 'bid', format = 'json');

-- q12: bids in the order of their arrival in the log, which is the time that the log knows.
CREATE TABLE bid_arrival (
    bidder BIGINT, p_time TIMESTAMPTZ METADATA FROM 'timestamp',
    WATERMARK FOR p_time AS p_time - INTERVAL '0' SECOND
) WITH (topic = 'bid', format = 'json');

-- q13: the small table that bids are joined with.
CREATE TABLE side_input (key BIGINT, value VARCHAR, PRIMARY KEY (key) NOT ENFORCED)
WITH (topic = 'side_input', format = 'json');
