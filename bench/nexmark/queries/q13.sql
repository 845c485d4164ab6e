-- Join with a side input: bids with a value from a small table, as it is when they are read.
INSERT INTO nexmark_q13
SELECT B.auction, B.bidder, B.price, B.dateTime, S.value
FROM (SELECT *, now() AS p_time FROM bid) AS B
JOIN side_input FOR SYSTEM_TIME AS OF B.p_time AS S ON mod(B.auction, 10000) = S.key
