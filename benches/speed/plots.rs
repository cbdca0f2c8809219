//! Figures as pictures: SVG, written by hand, readable on light and dark pages.

use std::fs;
use std::io;
use std::path::Path;

use crate::contender::Who;
use crate::line::{Result, Summary};

/// Who is drawn, with a colour that is told apart by most eyes.
const DRAWN: [(Who, &str); 3] = [
    (Who::Ours, "#0072b2"),
    (Who::Plain, "#999999"),
    (Who::Peer, "#d55e00"),
];
const WIDTH: f64 = 760.0;
const LEFT: f64 = 190.0;
const BAR: f64 = 14.0;

/// One picture: lines whose names begin so, by one figure.
struct Plot {
    file: &'static str,
    title: &'static str,
    prefixes: &'static [&'static str],
    key: &'static str,
    unit: &'static str,
}

const PLOTS: &[Plot] = &[
    Plot {
        file: "bulk.svg",
        title: "Bulk by size of packets (out) and receive buffers (in)",
        prefixes: &["out-", "in-", "both-"],
        key: "rate",
        unit: "GB/s",
    },
    Plot {
        file: "cpu.svg",
        title: "Processor time of device or client for a gigabyte",
        prefixes: &["out-", "in-"],
        key: "cpu",
        unit: "s/GB",
    },
    Plot {
        file: "trips.svg",
        title: "Question and answer, median",
        prefixes: &["trip-"],
        key: "p50",
        unit: "us",
    },
    Plot {
        file: "trips-p99.svg",
        title: "Question and answer, 99th percentile",
        prefixes: &["trip-"],
        key: "p99",
        unit: "us",
    },
    Plot {
        file: "churn.svg",
        title: "Connect, one byte, close",
        prefixes: &["churn-"],
        key: "conn/s",
        unit: "connections a second",
    },
];

/// Draws what was measured; a picture without a line is left out.
pub fn write(dir: &Path, results: &[Result]) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    for plot in PLOTS {
        let lines: Vec<_> = results
            .iter()
            .filter(|line| plot.prefixes.iter().any(|prefix| line.name.starts_with(prefix)))
            .filter(|line| line.summary(Who::Ours, plot.key).is_some())
            .collect();
        if !lines.is_empty() {
            fs::write(dir.join(plot.file), draw(plot, &lines))?;
        }
    }
    Ok(())
}

/// Horizontal bars in groups, a whisker from the least to the greatest.
fn draw(plot: &Plot, lines: &[&Result]) -> String {
    let bars: Vec<Vec<(&str, Summary)>> = lines
        .iter()
        .map(|line| {
            let of = |(who, colour): &(Who, &'static str)| Some((*colour, line.summary(*who, plot.key)?));
            DRAWN.iter().filter_map(of).collect()
        })
        .collect();
    let greatest = bars
        .iter()
        .flatten()
        .map(|(_, summary)| summary.greatest)
        .fold(0.0, f64::max);
    let scale = (WIDTH - LEFT - 90.0) / greatest.max(f64::MIN_POSITIVE);
    let height = 70.0
        + bars
            .iter()
            .map(|group| group.len() as f64 * BAR + 10.0)
            .sum::<f64>();
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n\
         <text x=\"10\" y=\"20\" font-size=\"14\">{}, {}</text>\n",
        plot.title, plot.unit
    );
    let mut x = LEFT;
    for (who, colour) in DRAWN {
        svg += &format!(
            "<rect x=\"{x}\" y=\"32\" width=\"10\" height=\"10\" fill=\"{colour}\"/><text x=\"{}\" y=\"41\">{}</text>\n",
            x + 14.0,
            who.name()
        );
        x += 90.0;
    }
    let mut y = 58.0;
    for (line, group) in lines.iter().zip(&bars) {
        let middle = y + group.len() as f64 * BAR / 2.0 + 4.0;
        svg += &format!(
            "<text x=\"{}\" y=\"{middle:.0}\" text-anchor=\"end\">{}</text>\n",
            LEFT - 8.0,
            line.name
        );
        for (colour, summary) in group {
            let (from, to) = (LEFT + summary.least * scale, LEFT + summary.greatest * scale);
            let (length, centre) = (summary.median * scale, y + BAR / 2.0 - 1.0);
            svg += &format!(
                "<rect x=\"{LEFT}\" y=\"{y}\" width=\"{length:.1}\" height=\"{}\" fill=\"{colour}\"/>\
                 <path d=\"M{from:.1} {centre}H{to:.1}\" stroke=\"#000000\"/>\
                 <text x=\"{:.1}\" y=\"{}\">{}</text>\n",
                BAR - 2.0,
                to.max(LEFT + length) + 5.0,
                y + BAR - 4.0,
                crate::report::number(summary.median)
            );
            y += BAR;
        }
        y += 10.0;
    }
    svg + "</svg>\n"
}
