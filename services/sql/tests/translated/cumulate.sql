CREATE TABLE bid (auction BIGINT, bidder BIGINT, price DOUBLE, channel VARCHAR, tags VARCHAR[], info STRUCT(page VARCHAR), ts TIMESTAMP, WATERMARK FOR ts AS ts - INTERVAL '4' SECOND) WITH (topic = 'bid');
SELECT window_end, COUNT(*) AS bids
FROM CUMULATE(TABLE bid, DESCRIPTOR(ts), INTERVAL '1' HOUR, INTERVAL '1' DAY) GROUP BY window_start, window_end;
