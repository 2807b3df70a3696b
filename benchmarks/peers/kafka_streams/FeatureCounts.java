import com.sun.management.OperatingSystemMXBean;
import java.io.IOException;
import java.io.UncheckedIOException;
import java.lang.management.ManagementFactory;
import java.nio.ByteBuffer;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Duration;
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
import org.apache.kafka.streams.kstream.Materialized;
import org.apache.kafka.streams.kstream.TimeWindows;
import org.apache.kafka.streams.state.QueryableStoreTypes;
import org.apache.kafka.streams.state.Stores;
import org.apache.kafka.streams.state.WindowBytesStoreSupplier;

/**
 * Count and sum by key in a tumbling window of one hour, on one stream thread.
 *
 * <p>Arguments: bootstrap, topic, schema file, schema id, records, warm records, store (memory or
 * rocksdb), commit interval in ms, state folder. Prints one JSON object.
 */
public final class FeatureCounts {
  record Reading(long occurredAtMs, double value) {}

  record Total(long count, double sum) {}

  private static final Duration WINDOW = Duration.ofHours(1);
  private static final String STORE = "totals";
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
              ByteBuffer.allocate(16).putLong(total.count()).putDouble(total.sum()).array(),
          (topic, data) -> {
            if (data == null) {
              return null;
            }
            ByteBuffer bytes = ByteBuffer.wrap(data);
            return new Total(bytes.getLong(), bytes.getDouble());
          });

  private final long records;
  private final long warm;
  private final CountDownLatch done = new CountDownLatch(1);
  private final OperatingSystemMXBean system =
      (OperatingSystemMXBean) ManagementFactory.getOperatingSystemMXBean();
  private long seen;
  private long beganNs;
  private long beganCpuNs;
  private volatile long endedNs;
  private volatile long endedCpuNs;

  private FeatureCounts(long records, long warm) {
    this.records = records;
    this.warm = warm;
  }

  /** Called for each record, by the one stream thread. */
  private Total add(Reading reading, Total total) {
    seen++;
    if (seen == warm) {
      beganNs = System.nanoTime();
      beganCpuNs = system.getProcessCpuTime();
    }
    if (seen == records) {
      endedNs = System.nanoTime();
      endedCpuNs = system.getProcessCpuTime();
      done.countDown();
    }
    return new Total(total.count() + 1, total.sum() + reading.value());
  }

  private StreamsBuilder topology(String topic, Serde<Reading> readings, String store) {
    WindowBytesStoreSupplier supplier =
        store.equals("memory")
            ? Stores.inMemoryWindowStore(STORE, Duration.ofHours(2), WINDOW, false)
            : Stores.persistentWindowStore(STORE, Duration.ofHours(2), WINDOW, false);
    Consumed<String, Reading> consumed =
        Consumed.with(Serdes.String(), readings)
            .withTimestampExtractor(
                (ConsumerRecord<Object, Object> record, long partitionTime) ->
                    record.value() instanceof Reading one ? one.occurredAtMs() : partitionTime);
    StreamsBuilder builder = new StreamsBuilder();
    builder.stream(topic, consumed)
        .filter((key, reading) -> reading != null)
        .groupByKey(Grouped.with(Serdes.String(), readings))
        .windowedBy(TimeWindows.ofSizeWithNoGrace(WINDOW))
        .aggregate(
            () -> new Total(0, 0.0),
            (key, reading, total) -> add(reading, total),
            Materialized.<String, Total>as(supplier)
                .withKeySerde(Serdes.String())
                .withValueSerde(TOTALS)
                .withCachingEnabled());
    return builder;
  }

  private static Properties settings(String bootstrap, long commitMs, Path state) {
    Properties settings = new Properties();
    settings.put(StreamsConfig.APPLICATION_ID_CONFIG, "counts-" + System.nanoTime());
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

  private void report(KafkaStreams streams) throws IOException {
    long count = 0;
    double sum = 0;
    var store =
        streams.store(
            StoreQueryParameters.fromNameAndType(
                STORE, QueryableStoreTypes.<String, Total>windowStore()));
    try (var all = store.all()) {
      while (all.hasNext()) {
        Total total = all.next().value;
        count += total.count();
        sum += total.sum();
      }
    }
    String peak =
        Files.readAllLines(Path.of("/proc/self/status")).stream()
            .filter(line -> line.startsWith("VmHWM"))
            .findFirst().orElseThrow().replaceAll("\\D", "");
    System.out.printf(
        "{\"figures\": {\"records\": %d, \"seconds\": %.6f, \"cpu_seconds\": %.6f, \"count\": %d, \"sum\": %s,"
            + " \"peak_rss_mb\": %d}}%n",
        records - warm, (endedNs - beganNs) / 1e9, (endedCpuNs - beganCpuNs) / 1e9, count, sum,
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
    FeatureCounts counts = new FeatureCounts(Long.parseLong(told[4]), Long.parseLong(told[5]));
    StreamsBuilder builder = counts.topology(told[1], readings, told[6]);
    Properties settings = settings(told[0], Long.parseLong(told[7]), Path.of(told[8]));
    try (KafkaStreams streams = new KafkaStreams(builder.build(), settings)) {
      streams.start();
      if (!counts.done.await(300, TimeUnit.SECONDS)) {
        throw new IllegalStateException("not all records came: " + counts.seen);
      }
      Thread.sleep(200); // the last record is put after its aggregation
      counts.report(streams);
    }
  }
}
