// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Drawing one chart of lines as SVG.

use std::io;

use plotters::prelude::*;

const SIZE: (u32, u32) = (840, 400);
/// Where the legend begins, beside the lines and not over them.
const LEGEND: i32 = 620;
/// Colours that the colour-blind can tell apart (Okabe and Ito).
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(0, 0, 0),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
];
/// The last quantile that is drawn: 99.99 %.
const NINES: f64 = 4.0;

/// A line.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Series {
    /// What the legend calls it.
    pub(super) name: String,
    /// Its colour: the same for the same subject in all charts.
    pub(super) colour: usize,
    /// In the chart's own coordinates.
    pub(super) points: Vec<(f64, f64)>,
}

/// What the horizontal axis shows.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Across {
    /// The names of the places 0, 1, 2, …
    Places(Vec<String>),
    /// Quantiles; place 1 is 90 %, 2 is 99 %, and so on.
    Quantiles,
}

/// A chart.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Chart {
    /// Above it.
    pub(super) title: String,
    /// Below it.
    pub(super) across: Across,
    /// What is across.
    pub(super) across_name: &'static str,
    /// What is up.
    pub(super) up_name: &'static str,
    /// The places upwards are decimal logarithms.
    pub(super) logarithmic: bool,
    /// The lines.
    pub(super) series: Vec<Series>,
}

/// Where a quantile is across.
pub(super) fn nines(quantile: f64) -> Option<f64> {
    let place = -(1.0 - quantile).log10();
    (place.is_finite() && place <= NINES + 1e-6).then_some(place)
}

impl Chart {
    /// The chart as SVG.
    pub(super) fn svg(&self) -> io::Result<String> {
        let mut svg = String::new();
        let result = self.draw(&mut svg);
        result.map_err(|error| io::Error::other(format!("{}: {error}", self.title)))?;
        Ok(svg)
    }

    fn draw(&self, svg: &mut String) -> Result<(), Box<dyn std::error::Error>> {
        let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
        root.fill(&WHITE)?;
        let (plot, legend) = root.split_horizontally(LEGEND);
        let (left, right, labels) = match &self.across {
            Across::Places(names) => (-0.2, names.len().max(2) as f64 - 0.8, names.len()),
            Across::Quantiles => (0.0, NINES, 5),
        };
        let (bottom, top) = self.heights();
        let mut chart = ChartBuilder::on(&plot)
            .caption(&self.title, ("sans-serif", 18))
            .margin(10)
            .margin_right(24)
            .x_label_area_size(42)
            .y_label_area_size(62)
            .build_cartesian_2d(left..right, bottom..top)?;
        chart
            .configure_mesh()
            .x_desc(self.across_name)
            .y_desc(self.up_name)
            .x_labels(labels)
            .x_label_formatter(&|place| self.across_label(*place))
            .y_label_formatter(&|place| self.up_label(*place))
            .light_line_style(TRANSPARENT)
            .bold_line_style(BLACK.mix(0.12))
            .draw()?;
        for (series, line) in self.series.iter().zip(0..) {
            let colour = COLOURS.get(series.colour % COLOURS.len()).copied().unwrap_or(BLACK);
            let style = colour.stroke_width(2);
            chart.draw_series(LineSeries::new(series.points.iter().copied(), style))?;
            let dot = |point: &(f64, f64)| Circle::new(*point, 3, colour.filled());
            chart.draw_series(series.points.iter().map(dot))?;
            let y = 60 + 20 * line;
            legend.draw(&PathElement::new(vec![(0, y), (18, y)], style))?;
            legend.draw(&Text::new(series.name.as_str(), (24, y - 6), ("sans-serif", 12)))?;
        }
        root.present()?;
        Ok(())
    }

    /// From the lowest to the highest, with some room above.
    fn heights(&self) -> (f64, f64) {
        let heights = self.series.iter().flat_map(|series| series.points.iter().map(|p| p.1));
        let highest = heights.clone().max_by(f64::total_cmp).unwrap_or(1.0);
        if self.logarithmic {
            let lowest = heights.min_by(f64::total_cmp).unwrap_or(0.0);
            (lowest.floor(), highest.ceil().max(lowest.floor() + 1.0))
        } else {
            (0.0, if highest > 0.0 { highest * 1.05 } else { 1.0 })
        }
    }

    fn across_label(&self, place: f64) -> String {
        if place.fract().abs() > 1e-6 {
            return String::new();
        }
        match &self.across {
            Across::Places(names) => {
                let name = |(index, _): &(usize, &String)| (*index as f64 - place).abs() < 0.5;
                names.iter().enumerate().find(name).map(|(_, n)| n.clone()).unwrap_or_default()
            }
            Across::Quantiles if place < 0.5 => "0".to_owned(),
            Across::Quantiles => {
                let percent = (1.0 - 10_f64.powf(-place)) * 100.0;
                format!("{}", (percent * 1000.0).round() / 1000.0)
            }
        }
    }

    fn up_label(&self, place: f64) -> String {
        if !self.logarithmic {
            return number(place);
        }
        if place.fract().abs() > 1e-6 { String::new() } else { number(10_f64.powf(place)) }
    }
}

/// A number for a label: short.
pub(super) fn number(value: f64) -> String {
    let short = |value: f64, unit: &str| format!("{}{unit}", (value * 100.0).round() / 100.0);
    match value.abs() {
        v if v >= 1e6 => short(value / 1e6, " M"),
        v if v >= 1e4 => short(value / 1e3, " k"),
        _ => short(value, ""),
    }
}
