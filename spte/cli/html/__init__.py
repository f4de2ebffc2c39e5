"""Reports as one page of HTML: pictures by plotly and tables that sort, all in the file, nothing from a network."""
