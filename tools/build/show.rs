//! What the program prints: progress and the table at the end.

use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use comfy_table::{Cell, CellAlignment, Table, presets};
use firstread::build::{Event, Progress, Report};
use firstread::oci::Reference;
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

/// A bar on a terminal.
pub struct Bar {
    bar: ProgressBar,
    chunks: AtomicU64,
    reused: AtomicU64,
    layers: AtomicU64,
    layer: AtomicU64,
}

impl Bar {
    /// A bar on stderr.
    pub fn new() -> Self {
        let bar = ProgressBar::no_length();
        bar.set_style(spinner());
        bar.enable_steady_tick(Duration::from_millis(120));
        let zero = || AtomicU64::new(0);
        Self { bar, chunks: zero(), reused: zero(), layers: zero(), layer: zero() }
    }
}

fn spinner() -> ProgressStyle {
    style("{spinner} {prefix:<10} {bytes} {binary_bytes_per_sec}  {msg}")
}

fn measured() -> ProgressStyle {
    style("{spinner} {prefix:<10} [{bar:30}] {bytes}/{total_bytes} {binary_bytes_per_sec}  {msg}")
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> ")
}

impl Progress for Bar {
    fn event(&self, event: Event<'_>) {
        match event {
            Event::Image { platform, layers, bytes } => {
                self.bar.reset();
                self.bar.set_prefix("reading");
                self.layers.store(layers as u64, Ordering::Relaxed);
                self.layer.store(0, Ordering::Relaxed);
                if let Some(bytes) = bytes {
                    self.bar.set_length(bytes);
                    self.bar.set_style(measured());
                }
                self.bar.set_message(platform.to_owned());
            }
            Event::Layer { name } => {
                let layer = self.layer.fetch_add(1, Ordering::Relaxed) + 1;
                let layers = self.layers.load(Ordering::Relaxed);
                let short: String = name.chars().take(19).collect();
                self.bar.set_message(format!("layer {layer} of {layers} ({short})"));
            }
            Event::Cached { name, bytes } => {
                let layer = self.layer.fetch_add(1, Ordering::Relaxed) + 1;
                let layers = self.layers.load(Ordering::Relaxed);
                let short: String = name.chars().take(19).collect();
                self.bar.set_message(format!("layer {layer} of {layers} ({short}) from the cache"));
                self.bar.inc(bytes);
            }
            Event::Read(bytes) | Event::Packed(bytes) => self.bar.inc(bytes),
            Event::Chunk { reused, .. } => {
                self.chunks.fetch_add(1, Ordering::Relaxed);
                self.reused.fetch_add(u64::from(reused), Ordering::Relaxed);
            }
            Event::Packing(bytes) => {
                self.bar.reset();
                self.bar.set_prefix("packing");
                self.bar.set_style(measured());
                self.bar.set_length(bytes);
                let (chunks, reused) = (self.chunks.load(Ordering::Relaxed), self.reused.load(Ordering::Relaxed));
                self.bar.set_message(format!("{chunks} chunks, {reused} reused"));
            }
            Event::Publish { digest, bytes } => {
                self.bar.set_prefix("publishing");
                self.bar.set_message(format!("{digest} ({})", HumanBytes(bytes)));
            }
            Event::Note(text) => self.bar.println(format!("note: {text}")),
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// Plain lines, where there is no terminal.
#[derive(Default)]
pub struct Lines {
    chunks: AtomicU64,
    reused: AtomicU64,
}

impl Progress for Lines {
    fn event(&self, event: Event<'_>) {
        let line = match event {
            Event::Image { platform, layers, bytes: Some(bytes) } => {
                format!("{platform}: {layers} layers, {}", HumanBytes(bytes))
            }
            Event::Image { platform, .. } => platform.to_owned(),
            Event::Layer { name } => format!("reading {name}"),
            Event::Cached { name, .. } => format!("from the cache {name}"),
            Event::Chunk { reused, .. } => {
                self.chunks.fetch_add(1, Ordering::Relaxed);
                self.reused.fetch_add(u64::from(reused), Ordering::Relaxed);
                return;
            }
            Event::Read(_) | Event::Packed(_) => return,
            Event::Packing(bytes) => {
                let (chunks, reused) = (self.chunks.load(Ordering::Relaxed), self.reused.load(Ordering::Relaxed));
                format!("packing {chunks} chunks ({reused} reused), {} new", HumanBytes(bytes))
            }
            Event::Publish { digest, bytes } => format!("publishing {digest}, {}", HumanBytes(bytes)),
            Event::Note(text) => format!("note: {text}"),
        };
        // Nothing can be done when stderr is gone.
        let _ = writeln!(std::io::stderr(), "{line}");
    }
}

/// The summary.
pub fn table(report: &Report, destination: &Reference) -> Table {
    let size = |bytes: u64| HumanBytes(bytes).to_string();
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    let mut row = |name: &str, value: String| {
        table.add_row([Cell::new(name), Cell::new(value).set_alignment(CellAlignment::Left)]);
    };
    row("image", destination.to_string());
    row("digest", report.digest.to_string());
    row("platforms", report.platforms.join(", "));
    match report.inodes {
        0 => row("device", format!("{}, a disk image", size(report.device_bytes))),
        inodes => row("device", format!("{}, {inodes} inodes", size(report.device_bytes))),
    }
    match report.cached_layers {
        0 => row("layers", format!("{}, {} read", report.layers, size(report.read_bytes))),
        cached => {
            row("layers", format!("{}, {cached} from the cache, {} read", report.layers, size(report.read_bytes)));
        }
    }
    row("chunks", format!("{}, {} plain", report.chunks, size(report.plain_bytes)));
    row(
        "stored",
        format!("{}, {} new, {} reused", size(report.stored_bytes), size(report.new_bytes), size(report.reused_bytes)),
    );
    row("index", size(report.index_bytes));
    if let Some(startup) = &report.startup {
        let (stored, plain) = (size(startup.stored_bytes), size(startup.plain_bytes));
        row("start-up pack", format!("{stored} for {plain} in {} chunks", startup.chunks));
        if startup.lost_blocks > 0 {
            row("not there", format!("{} of the profile", size(startup.lost_blocks * 4096)));
        }
    }
    if !report.verity.is_empty() {
        row("verity", report.verity.join(", "));
    }
    let speed = report.plain_bytes as f64 / report.seconds.max(0.001);
    row("time", format!("{:.1?}, {}/s", Duration::from_secs_f64(report.seconds), size(speed as u64)));
    table
}
