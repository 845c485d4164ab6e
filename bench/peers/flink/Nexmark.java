// Runs queries of Nexmark on Flink's local mini cluster: `java -cp 'jars/*' Nexmark.java WARM_UP SMALL FOLDER QUERY …`.
// Each runs over the files of three folders: of the first, so that its code is compiled; of the second, to see what
// planning it, and starting and ending the cluster cost; and of the third. Prints what the third run took beyond the
// second: CPU seconds of this process, all of its threads, and seconds.
import com.sun.management.OperatingSystemMXBean;
import java.lang.management.ManagementFactory;
import java.nio.file.Files;
import java.nio.file.Path;
import org.apache.flink.configuration.Configuration;
import org.apache.flink.streaming.api.environment.StreamExecutionEnvironment;
import org.apache.flink.table.api.EnvironmentSettings;
import org.apache.flink.table.api.TableConfig;
import org.apache.flink.table.api.bridge.java.StreamTableEnvironment;
import org.apache.flink.table.catalog.Column;

public class Nexmark {
    private static final Path QUERIES = Path.of(System.getProperty("queries"));

    public static void main(String[] arguments) throws Exception {
        OperatingSystemMXBean system = (OperatingSystemMXBean) ManagementFactory.getOperatingSystemMXBean();
        for (int number = 3; number < arguments.length; number++) {
            String query = Files.readString(QUERIES.resolve(arguments[number] + ".sql"));
            double[] cpu = new double[3];
            double[] elapsed = new double[3];
            for (int folder = 0; folder < 3; folder++) {
                System.gc();
                long cpuBefore = system.getProcessCpuTime();
                long began = System.nanoTime();
                run(query, Path.of(arguments[folder]));
                elapsed[folder] = (System.nanoTime() - began) / 1e9;
                cpu[folder] = (system.getProcessCpuTime() - cpuBefore) / 1e9;
            }
            System.out.printf(
                    "{\"query\": \"%s\", \"cpu_s\": %.3f, \"seconds\": %.3f, \"start_cpu_s\": %.3f}%n",
                    arguments[number], cpu[2] - cpu[1], elapsed[2] - elapsed[1], cpu[1]);
        }
        System.exit(0);
    }

    private static void run(String query, Path folder) throws Exception {
        StreamTableEnvironment tables = environment(folder.resolve("checkpoints"));
        String declarations = Files.readString(QUERIES.resolve("tables.sql"));
        for (String declaration : declarations.replace("{folder}", folder.toUri().toString()).split(";")) {
            if (!declaration.isBlank()) {
                tables.executeSql(declaration);
            }
        }
        StringBuilder columns = new StringBuilder();
        for (Column column : tables.sqlQuery(query).getResolvedSchema().getColumns()) {
            String type = column.getDataType().getLogicalType().copy(true).asSerializableString();
            columns.append(columns.isEmpty() ? "" : ", ").append('`').append(column.getName()).append("` ").append(type);
        }
        tables.executeSql("CREATE TABLE discarded (" + columns + ") WITH ('connector' = 'blackhole')");
        tables.executeSql("INSERT INTO discarded " + query).await();
    }

    // What the benchmark's authors run Flink with, and what is fastest on one core: all state on the heap.
    private static StreamTableEnvironment environment(Path checkpoints) {
        Configuration settings = new Configuration();
        settings.setString("taskmanager.numberOfTaskSlots", "1");
        settings.setString("taskmanager.memory.managed.size", "256m");
        settings.setString("taskmanager.memory.network.min", "128m");
        settings.setString("taskmanager.memory.network.max", "128m");
        settings.setString("state.backend.type", "hashmap");
        settings.setString("pipeline.object-reuse", "true");
        settings.setString("execution.checkpointing.mode", "EXACTLY_ONCE");
        settings.setString("execution.checkpointing.interval", "10s");
        settings.setString("execution.checkpointing.storage", "filesystem");
        settings.setString("execution.checkpointing.dir", checkpoints.toUri().toString());
        StreamExecutionEnvironment cluster = StreamExecutionEnvironment.createLocalEnvironment(1, settings);
        StreamTableEnvironment tables =
                StreamTableEnvironment.create(cluster, EnvironmentSettings.inStreamingMode());
        TableConfig table = tables.getConfig();
        table.set("table.local-time-zone", "UTC");
        table.set("table.exec.mini-batch.enabled", "true");
        table.set("table.exec.mini-batch.allow-latency", "2s");
        table.set("table.exec.mini-batch.size", "50000");
        table.set("table.optimizer.distinct-agg.split.enabled", "true");
        return tables;
    }
}
