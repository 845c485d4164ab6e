CREATE TABLE bid (auction BIGINT, bidder BIGINT, price DOUBLE, channel VARCHAR, tags VARCHAR[], info STRUCT(page VARCHAR), ts TIMESTAMP, WATERMARK FOR ts AS ts - INTERVAL '4' SECOND) WITH (topic = 'bid');
SELECT w.window_start, w.window_time, w.channel, AVG(w.price) AS mean
FROM HOP(TABLE bid, DESCRIPTOR(ts), INTERVAL '200' MILLISECOND, INTERVAL '1000' SECOND, INTERVAL '3' SECOND) AS w
GROUP BY w.window_start, w.window_end, w.window_time, w.channel;
