CREATE TABLE bid (auction BIGINT, bidder BIGINT, price DOUBLE, channel VARCHAR, tags VARCHAR[], info STRUCT(page VARCHAR), ts TIMESTAMP, WATERMARK FOR ts AS ts - INTERVAL '4' SECOND) WITH (topic = 'bid');
-- Counted each ten seconds.
CREATE MATERIALIZED VIEW per_auction AS
SELECT window_start, window_end, auction, COUNT(*) AS bids, MAX(price) AS highest
FROM TUMBLE(TABLE bid, DESCRIPTOR(ts), INTERVAL '10' SECOND)
GROUP BY window_start, window_end, auction
EMIT ON WINDOW CLOSE;
