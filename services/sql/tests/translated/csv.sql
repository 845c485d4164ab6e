CREATE TABLE readings (room VARCHAR, degrees DOUBLE) WITH (topic = 'readings', format = 'csv', delimiter = ';', bad_rows = 'skip');
SELECT room, MAX(degrees) AS hottest FROM readings GROUP BY room;
