import com.sun.management.OperatingSystemMXBean;
import java.io.IOException;
import java.io.PrintWriter;
import java.io.UncheckedIOException;
import java.lang.management.ManagementFactory;
import java.nio.ByteBuffer;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Duration;
import java.time.Instant;
import java.util.List;
import java.util.Properties;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.TimeUnit;
import org.apache.avro.Schema;
import org.apache.avro.SchemaBuilder;
import org.apache.avro.generic.GenericDatumReader;
import org.apache.avro.generic.GenericRecord;
import org.apache.avro.io.BinaryDecoder;
import org.apache.avro.io.DecoderFactory;
import org.apache.kafka.clients.consumer.ConsumerConfig;
import org.apache.kafka.clients.consumer.ConsumerRecord;
import org.apache.kafka.clients.producer.ProducerConfig;
import org.apache.kafka.common.serialization.Deserializer;
import org.apache.kafka.common.serialization.Serde;
import org.apache.kafka.common.serialization.Serdes;
import org.apache.kafka.streams.KafkaStreams;
import org.apache.kafka.streams.StoreQueryParameters;
import org.apache.kafka.streams.StreamsBuilder;
import org.apache.kafka.streams.StreamsConfig;
import org.apache.kafka.streams.kstream.Consumed;
import org.apache.kafka.streams.kstream.Grouped;
import org.apache.kafka.streams.kstream.KGroupedStream;
import org.apache.kafka.streams.kstream.Materialized;
import org.apache.kafka.streams.kstream.TimeWindows;
import org.apache.kafka.streams.state.QueryableStoreTypes;
import org.apache.kafka.streams.state.Stores;

/**
 * Eight aggregates by key in tumbling windows of one, two and three hours, on one stream thread.
 *
 * <p>Arguments: bootstrap, topic, schema file, schema id, records, warm records, commit interval in
 * ms, state folder, result file. Windows are in RocksDB. Prints one JSON object and writes the
 * windows that the last record is in.
 */
public final class WindowAggregates {
  record Reading(long occurredAtMs, double value) {}

  /** Events come in order of time, so the first one and the newest one are the outer ones. */
  record Total(
      long count, double sum, double squares, double min, double max, double first, double last) {
    Total add(double value) {
      return new Total(
          count + 1,
          sum + value,
          squares + value * value,
          Math.min(min, value),
          Math.max(max, value),
          count == 0 ? value : first,
          value);
    }

    double mean() {
      return sum / count;
    }

    double std() {
      return Math.sqrt(Math.max(squares / count - mean() * mean(), 0.0));
    }
  }

  private static final Total NOTHING =
      new Total(
          0, 0, 0, Double.POSITIVE_INFINITY, Double.NEGATIVE_INFINITY, Double.NaN, Double.NaN);
  private static final List<Integer> HOURS = List.of(1, 2, 3);
  private static final long CACHE_BYTES = 256L << 20;
  private static final int FETCH_BYTES = 4 << 20;

  /** Decodes only the two fields that are needed; null for records of another schema. */
  private static final class ReadingDeserializer implements Deserializer<Reading> {
    private final int id;
    private final GenericDatumReader<GenericRecord> reader;
    private BinaryDecoder decoder;
    private GenericRecord reused;

    ReadingDeserializer(Schema writer, int id) {
      Schema needed =
          SchemaBuilder.record("ReadingTaken").namespace("benchmarks").fields()
              .requiredLong("occurred_at").requiredDouble("value").endRecord();
      this.id = id;
      this.reader = new GenericDatumReader<>(writer, needed);
    }

    @Override
    public Reading deserialize(String topic, byte[] data) {
      if (data == null || ByteBuffer.wrap(data).getInt(1) != id) {
        return null;
      }
      decoder = DecoderFactory.get().binaryDecoder(data, 5, data.length - 5, decoder);
      try {
        reused = reader.read(reused, decoder);
      } catch (IOException error) {
        throw new UncheckedIOException(error);
      }
      return new Reading((Long) reused.get(0) / 1000, (Double) reused.get(1));
    }
  }

  private static final Serde<Total> TOTALS =
      Serdes.serdeFrom(
          (topic, total) ->
              ByteBuffer.allocate(56).putLong(total.count()).putDouble(total.sum())
                  .putDouble(total.squares()).putDouble(total.min()).putDouble(total.max())
                  .putDouble(total.first()).putDouble(total.last()).array(),
          (topic, data) -> {
            if (data == null) {
              return null;
            }
            ByteBuffer bytes = ByteBuffer.wrap(data);
            return new Total(
                bytes.getLong(), bytes.getDouble(), bytes.getDouble(), bytes.getDouble(),
                bytes.getDouble(), bytes.getDouble(), bytes.getDouble());
          });

  private final long records;
  private final long warm;
  private final CountDownLatch done = new CountDownLatch(1);
  private final OperatingSystemMXBean system =
      (OperatingSystemMXBean) ManagementFactory.getOperatingSystemMXBean();
  private long seen;
  private long beganNs;
  private long beganCpuNs;
  private volatile long newestMs;
  private volatile long endedNs;
  private volatile long endedCpuNs;

  private WindowAggregates(long records, long warm) {
    this.records = records;
    this.warm = warm;
  }

  /** Called for each record and window, by the one stream thread; the last window counts. */
  private Total add(int hours, Reading reading, Total total) {
    if (hours == HOURS.get(HOURS.size() - 1)) {
      seen++;
      if (seen == warm) {
        beganNs = System.nanoTime();
        beganCpuNs = system.getProcessCpuTime();
      }
      if (seen == records) {
        newestMs = reading.occurredAtMs();
        endedNs = System.nanoTime();
        endedCpuNs = system.getProcessCpuTime();
        done.countDown();
      }
    }
    return total.add(reading.value());
  }

  private static String store(int hours) {
    return "totals-" + hours + "h";
  }

  private StreamsBuilder topology(String topic, Serde<Reading> readings) {
    Consumed<String, Reading> consumed =
        Consumed.with(Serdes.String(), readings)
            .withTimestampExtractor(
                (ConsumerRecord<Object, Object> record, long partitionTime) ->
                    record.value() instanceof Reading one ? one.occurredAtMs() : partitionTime);
    StreamsBuilder builder = new StreamsBuilder();
    KGroupedStream<String, Reading> grouped =
        builder.stream(topic, consumed)
            .filter((key, reading) -> reading != null)
            .groupByKey(Grouped.with(Serdes.String(), readings));
    for (int hours : HOURS) {
      Duration window = Duration.ofHours(hours);
      grouped
          .windowedBy(TimeWindows.ofSizeWithNoGrace(window))
          .aggregate(
              () -> NOTHING,
              (key, reading, total) -> add(hours, reading, total),
              Materialized.<String, Total>as(
                      Stores.persistentWindowStore(
                          store(hours), window.multipliedBy(2), window, false))
                  .withKeySerde(Serdes.String())
                  .withValueSerde(TOTALS)
                  .withCachingEnabled());
    }
    return builder;
  }

  private static Properties settings(String bootstrap, long commitMs, Path state) {
    Properties settings = new Properties();
    settings.put(StreamsConfig.APPLICATION_ID_CONFIG, "windows-" + System.nanoTime());
    settings.put(StreamsConfig.BOOTSTRAP_SERVERS_CONFIG, bootstrap);
    settings.put(StreamsConfig.NUM_STREAM_THREADS_CONFIG, 1);
    settings.put(StreamsConfig.STATE_DIR_CONFIG, state.toString());
    settings.put(StreamsConfig.COMMIT_INTERVAL_MS_CONFIG, commitMs);
    settings.put(StreamsConfig.STATESTORE_CACHE_MAX_BYTES_CONFIG, CACHE_BYTES);
    settings.put(StreamsConfig.BUFFERED_RECORDS_PER_PARTITION_CONFIG, 20_000);
    settings.put(ConsumerConfig.AUTO_OFFSET_RESET_CONFIG, "earliest");
    settings.put(ConsumerConfig.MAX_POLL_RECORDS_CONFIG, 10_000);
    settings.put(ConsumerConfig.MAX_PARTITION_FETCH_BYTES_CONFIG, FETCH_BYTES);
    settings.put(StreamsConfig.producerPrefix(ProducerConfig.COMPRESSION_TYPE_CONFIG), "lz4");
    settings.put(StreamsConfig.producerPrefix(ProducerConfig.LINGER_MS_CONFIG), 100);
    return settings;
  }

  private void write(KafkaStreams streams, Path result) throws IOException {
    try (PrintWriter out = new PrintWriter(Files.newBufferedWriter(result))) {
      out.println("key,hours,count,sum,mean,min,max,std,first,last");
      for (int hours : HOURS) {
        long length = Duration.ofHours(hours).toMillis();
        Instant start = Instant.ofEpochMilli(newestMs / length * length);
        var store =
            streams.store(
                StoreQueryParameters.fromNameAndType(
                    store(hours), QueryableStoreTypes.<String, Total>windowStore()));
        try (var all = store.fetchAll(start, start)) {
          while (all.hasNext()) {
            var one = all.next();
            Total it = one.value;
            out.printf(
                "%s,%d,%d,%s,%s,%s,%s,%s,%s,%s%n",
                one.key.key(), hours, it.count(), it.sum(), it.mean(), it.min(), it.max(),
                it.std(), it.first(), it.last());
          }
        }
      }
    }
  }

  private void report() throws IOException {
    String peak =
        Files.readAllLines(Path.of("/proc/self/status")).stream()
            .filter(line -> line.startsWith("VmHWM"))
            .findFirst().orElseThrow().replaceAll("\\D", "");
    System.out.printf(
        "{\"figures\": {\"records\": %d, \"seconds\": %.6f, \"cpu_seconds\": %.6f,"
            + " \"peak_rss_mb\": %d}}%n",
        records - warm, (endedNs - beganNs) / 1e9, (endedCpuNs - beganCpuNs) / 1e9,
        Long.parseLong(peak) / 1000);
  }

  public static void main(String[] told) throws Exception {
    Schema writer = new Schema.Parser().parse(Path.of(told[2]).toFile());
    Deserializer<Reading> deserializer = new ReadingDeserializer(writer, Integer.parseInt(told[3]));
    Serde<Reading> readings =
        Serdes.serdeFrom(
            (topic, reading) -> {
              throw new UnsupportedOperationException("readings are only read");
            },
            deserializer);
    WindowAggregates windows =
        new WindowAggregates(Long.parseLong(told[4]), Long.parseLong(told[5]));
    StreamsBuilder builder = windows.topology(told[1], readings);
    Properties settings = settings(told[0], Long.parseLong(told[6]), Path.of(told[7]));
    try (KafkaStreams streams = new KafkaStreams(builder.build(), settings)) {
      streams.start();
      if (!windows.done.await(300, TimeUnit.SECONDS)) {
        throw new IllegalStateException("not all records came: " + windows.seen);
      }
      Thread.sleep(200); // the last record is put after its aggregation
      windows.report(); // before the results are written: they take memory, too
      windows.write(streams, Path.of(told[8]));
    }
  }
}
