-- Average selling price by seller: of the last ten auctions of each.
INSERT INTO nexmark_q6
SELECT Q.seller,
    avg(Q.price) OVER (PARTITION BY Q.seller ORDER BY Q.dateTime ROWS BETWEEN 10 PRECEDING AND CURRENT ROW) AS price
FROM (
    SELECT W.id, W.seller, W.price, W.dateTime,
        row_number() OVER (PARTITION BY W.id, W.seller ORDER BY W.price DESC) AS rownum
    FROM (
        SELECT A.id, A.seller, B.price, B.dateTime
        FROM auction AS A JOIN bid AS B
            ON A.id = B.auction AND B.dateTime BETWEEN A.dateTime AND A.expires
    ) AS W
) AS Q
WHERE Q.rownum <= 1
